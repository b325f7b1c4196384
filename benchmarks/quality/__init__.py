"""Quality of the models beside those of FuxiCTR, on the same rows and IDs."""
