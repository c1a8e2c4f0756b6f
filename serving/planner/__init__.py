"""Will it fit, how fast, at what price: what can be said of a model on a rig before it is downloaded."""
