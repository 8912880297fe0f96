"""The whole report on how the facts of a model hang together, without training: `goldy coupling`."""
