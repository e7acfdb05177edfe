"""The study of balancing rules: what its language-model and image commands share."""
