"""ONNX Runtime, its telemetry switched off: nothing is sent anywhere unless the user has asked for it.

The switch is read once, when the library is loaded. So it stands where every way to it begins.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
