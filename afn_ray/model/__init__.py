"""The only door to transformers: find a model, load and self-check it, and read its layers."""

import gc
import warnings

_collects = gc.isenabled()
# None of transformers' 600,000 objects is garbage; a search is a fifth of the import.
gc.disable()
# In a notebook without ipywidgets tqdm, which transformers imports, warns that it cannot draw.
warnings.filterwarnings("ignore", "IProgress not found")
try:
    from afn_ray.model.device import limit_memory
    from afn_ray.model.engine import Model
    from afn_ray.model.files import (
        DEFAULT_WINDOW_TOKENS,
        MAKERS,
        VERSIONS,
        ModelFiles,
        choose_device,
        count_devices,
        find_model,
        is_device_fault,
        load_identified,
        load_tokenizer,
    )
    from afn_ray.model.fused import time_norms
    from afn_ray.model.linear import has_fast_products
    from afn_ray.model.memory import free_memory, is_out_of_memory
    from afn_ray.model.pending import Pending
    from afn_ray.model.prove import prepare
    from afn_ray.model.task import Decided, decide
finally:
    if not gc.get_freeze_count():  # nobody else has frozen objects, which would thaw
        gc.freeze()
        gc.unfreeze()  # all are old now, as if they had been looked at
    if _collects:
        gc.enable()

__all__ = [
    "DEFAULT_WINDOW_TOKENS",
    "MAKERS",
    "VERSIONS",
    "Decided",
    "Model",
    "ModelFiles",
    "Pending",
    "choose_device",
    "count_devices",
    "decide",
    "find_model",
    "free_memory",
    "has_fast_products",
    "is_device_fault",
    "is_out_of_memory",
    "limit_memory",
    "load_identified",
    "load_tokenizer",
    "prepare",
    "time_norms",
]
