"""May a run go on with a store that is not the one it was trained on? python -m trainer.compat"""
