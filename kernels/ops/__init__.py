"""The torch operators: schemas, fakes, autograd, vmap, and the problems they pass to a backend."""
