"""The mathematics of the guarantee; knows no model and no data."""
