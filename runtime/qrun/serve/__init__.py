"""HTTP: the APIs that client libraries speak, over an ``Engine``. Nothing else of qrun knows HTTP."""
