"""The course's own package: one room for each step from base model to verdict."""

import os

# Every file comes from the checked cache; a lookup on the hub would only stall a room without wifi.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
