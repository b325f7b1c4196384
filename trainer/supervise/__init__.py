"""A run that is started again by itself: on the hosts that are left, and on all of them when they are back."""
