"""Wrong answers that readers give to the exercises of lesson 00, and the words by which the checks must name them."""

from llama_edu.exercises.family import check_cache_bytes, check_crossover, check_training_days

_CACHE = "def cache_bytes(n_layers, n_heads, n_kv_heads, head_dim, tokens):\n    "
_DAYS = "def training_days(n_params, n_tokens, gpus, peak, utilisation):\n    nd = n_params * n_tokens\n    "
_CROSS = "def crossover(weights, n_layers, n_heads, head_dim):\n    "

MISTAKES = [
    (check_cache_bytes, _CACHE + "return 4 * n_layers * n_heads * head_dim * tokens", "query heads"),
    (check_cache_bytes, _CACHE + "return 2 * n_layers * n_kv_heads * head_dim * tokens", "a key and a value"),
    (check_cache_bytes, _CACHE + "return n_layers * n_kv_heads * head_dim * tokens", "a quarter"),
    (check_cache_bytes, _CACHE + "return 4 * n_kv_heads * head_dim * tokens", "one layer"),
    (check_cache_bytes, _CACHE + "return 4 * n_layers * n_kv_heads * head_dim", "one token"),
    (check_cache_bytes, _CACHE + "return 4 * n_layers * head_dim * tokens", "one head"),
    (check_cache_bytes, _CACHE + "return 12 * n_layers * head_dim * tokens", "2 · L · K · h"),
    (check_training_days, _DAYS + "return 2 * nd / (gpus * peak * utilisation) / 86400", "forward pass"),
    (check_training_days, _DAYS + "return 4 * nd / (gpus * peak * utilisation) / 86400", "with the for"),
    (check_training_days, _DAYS + "return 6 * nd / (gpus * peak) / 86400", "whole peak"),
    (check_training_days, _DAYS + "return 6 * nd * utilisation / (gpus * peak) / 86400", "longer"),
    (check_training_days, _DAYS + "return 6 * nd / (peak * utilisation) / 86400", "one GPU"),
    (check_training_days, _DAYS + "return 6 * nd / (gpus * peak * utilisation)", "seconds"),
    (check_training_days, _DAYS + "return 6 * nd / (gpus * peak * utilisation) / 3600", "hours"),
    (check_crossover, _CROSS + "return weights / (2 * n_layers * n_heads * head_dim)", "half the length"),
    (check_crossover, _CROSS + "return 2 * weights / (n_layers * n_heads * head_dim)", "twice the length"),
    (check_crossover, _CROSS + "return 4 * weights / (n_layers * n_heads * head_dim)", "four times"),
    (check_crossover, _CROSS + "return weights / (n_heads * head_dim)", "one of the layers"),
    (check_crossover, _CROSS + "return weights / (n_layers * head_dim)", "one of the heads"),
    (check_crossover, _CROSS + "return weights", "differ"),
]  # fmt: skip
