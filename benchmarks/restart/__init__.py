"""How long a supervised run takes to continue after a loss."""
