"""ONNX Runtime, with the switches that it reads from the environment.

They are set here, where every way to the library begins: before it is loaded, once, and only where the user
has not set them. Programs that this process starts inherit them, as they inherit a user's.
"""

import os

# Nothing is sent anywhere unless the user has asked for it; read when the library is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# How GroupQueryAttention computes on the CPU (see ``attention``); read while a session is opened. There is no
# option of a session for it, and the environment is no place to write to while other threads run.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
