"""How good samples are: distances to data, classifiers, features."""
