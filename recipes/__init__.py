"""Ready recipes: one YAML each, in LightningCLI form."""

if __name__ != "lightning_plugins.recipes":
    raise ImportError("import lightning_plugins.recipes, not recipes: a second name would load everything twice")
