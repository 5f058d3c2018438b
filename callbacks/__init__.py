"""How each method meets a Trainer: one file per callback, no mathematics."""

if __name__ != "lightning_plugins.callbacks":
    raise ImportError("import lightning_plugins.callbacks, not callbacks: a second name would load every class twice")
