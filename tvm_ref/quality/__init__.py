"""Quality of samples.

metrics (Frechet distance for FID, Wasserstein distance, precision and recall), inception (features for FID), reference
(reads reference statistics), digit_classifier (accuracy of generated digits), evaluation (which metrics are computed
for which data).
"""
