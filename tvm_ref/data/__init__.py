"""Training data: which data set, in which order, and how its files are read.

dataset (`open_dataset`, `DataConfig`, order of the batches), archive (zip files and folders of images or VAE latents;
archive_writer writes them), digits, toys and point_sets (small built-in data sets), fashion (Fashion-MNIST), latents
(normalisation), vae (the autoencoder),
noise (reproducible noise), fingerprint, tolerant (skips bad items), safe_pickle (reads untrusted pickles without
executing them, with pickle_limits, stand_ins and torch_file), npy and safetensors_header (headers that may lie),
untrusted (opens files that may be hostile).
"""
