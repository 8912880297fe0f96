"""What trains: the LightningModule, the mixin, variants side by side, models, masks and recipes."""
