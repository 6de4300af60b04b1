"""`llama-edu VERB ...`: finds the verb, imports only its module, and turns mistakes into one sentence."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from llama_edu._version import __version__
from llama_edu.errors import UserError

# verb -> (module, function, what it does)
VERBS = {
    "tour": ("llama_edu.cli.tour", "tour", "the whole way, from raw text to generated text and a report"),
    "tokenize": ("llama_edu.cli.tokenize", "tokenize", "train a tokenizer, or show how one cuts a text"),
    "data": ("llama_edu.cli.data", "data", "make token shards from text, or check tokens and mixtures"),
    "train": ("llama_edu.cli.train", "train_model", "train a model on your text, or go on with one"),
    "generate": ("llama_edu.cli.generate", "generate_text", "continue a prompt with a saved model"),
    "chat": ("llama_edu.cli.chat", "chat", "talk with a saved model"),
    "convert": ("llama_edu.cli.convert", "convert", "between the Hugging Face and the Meta layout of weights"),
    "plan": ("llama_edu.cli.plan", "plan", "price a division of a model over many GPUs, or search for the best"),
    "scaling": ("llama_edu.cli.scaling", "scaling", "fit scaling laws to a table of runs"),
    "exercises": ("llama_edu.cli.exercises", "exercises", "what there is to solve, and what you have solved"),
    "doctor": ("llama_edu.cli.doctor", "doctor", "what this machine has, and what will work on it"),
    "lab": ("llama_edu.cli.lab", "lab", "open the lessons in JupyterLab"),
}


def usage() -> str:
    lines = [f"  {verb:10} {text}" for verb, (_, _, text) in VERBS.items()]
    head = ["usage: llama-edu VERB [options]", "", "The Llama family, step by step. The verbs:", ""]
    tail = ["", "`llama-edu VERB --help` lists the options of one; `llama-edu --version` prints the version."]
    return "\n".join([*head, *lines, *tail])


def run(argv: list[str]) -> int:
    """Run one command line. Returns the exit code: 0 done, 2 a mistake of the user's, told on standard error."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"llama-edu {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}; the verbs are {', '.join(VERBS)}")
    module, name, _ = VERBS[verb]
    function = getattr(import_module(module), name)
    if getattr(function, "parses_itself", False):
        return function(rest)
    import tyro

    result = tyro.cli(function, args=rest, prog=f"llama-edu {verb}")
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the command."""
    try:
        code = run(sys.argv[1:])
    except UserError as error:
        print(f"llama-edu: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say, and to nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a folder that cannot be written: the system's own sentence is the best one
        name = f": {error.filename}" if error.filename else ""
        print(f"llama-edu: {error.strerror or error}{name}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("llama-edu: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
