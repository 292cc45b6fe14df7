"""Quality of samples.

metrics (Frechet distance for FID, Wasserstein distance, precision and recall), diversity (variance within classes),
inception (features for FID), reference (reads reference statistics), digit_classifier (figures of generated digits),
evaluation (which metrics are computed for which data).
"""
