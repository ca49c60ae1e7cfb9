"""Floor 0, the ground: seeds and devices, typed records, statistics, the artifact store.

Import from the module that owns a name (`from lifecycle_lib.core.store import Store`). Nothing is re-exported
here, so that reading a JSON file does not import torch.
"""
