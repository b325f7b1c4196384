"""How long a supervised run takes to go on after a loss."""
