"""Base models in three sizes: real ones from the cache, tiny ones from a config, full-size shapes.

Tiny models have random weights and show behaviour; real ones learn; full-size ones live on the
meta device, where a parameter has a shape and a dtype but no memory.
"""

from .architectures import IMAGE_TOKEN, TASKS, TINY, VOCABULARY, tiny
from .converted import CONVERTED, CONVERTER_VERSION, folder, path
from .hardware import describe_device, device, dtype
from .published import CONFIGS, FULL_SIZE, full_size, published_config
from .whisper import accept_no_text, shorten_audio

__all__ = [
    "CONFIGS",
    "CONVERTED",
    "CONVERTER_VERSION",
    "FULL_SIZE",
    "IMAGE_TOKEN",
    "TASKS",
    "TINY",
    "VOCABULARY",
    "accept_no_text",
    "describe_device",
    "device",
    "dtype",
    "folder",
    "full_size",
    "path",
    "published_config",
    "shorten_audio",
    "tiny",
]
