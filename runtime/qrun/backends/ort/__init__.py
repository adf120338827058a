"""ONNX Runtime, with the switches that it reads from the environment.

They are set here because every module that loads the library is in this package: they are set once, before it
is loaded, and only where the user has not set them. Programs that this process starts inherit them.
"""

import os

# Nothing is sent anywhere unless the user has asked for it. The library reads this when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# How GroupQueryAttention computes on the CPU (see ``attention``). The library reads this while a session is
# opened. Sessions have no option for it, and the environment should not be written while other threads run.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
