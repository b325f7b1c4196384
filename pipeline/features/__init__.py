"""From images to a feature store: extract what is new, refresh what has changed."""
