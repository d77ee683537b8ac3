import harness  # noqa: F401  first, because it ends a Python that is too old in one line
