"""Quality of samples.

metrics (Frechet distance for FID, Wasserstein distance, precision and recall), diversity (variance within classes),
inception and vit (features of images), reference (reads reference statistics), digit_classifier (figures of generated
digits), classifier and feature_judge (the same by features of a classifier, for experiments and Fashion-MNIST),
evaluation (which metrics are computed for points, squares, digits and Fashion-MNIST), images (the same for images and
latents, by several processes).
"""
