"""Quality of the models compared with those of FuxiCTR, on the same rows and IDs."""
