"""The command `llama-edu VERB`: thin functions over the package."""
