"""Using the zeros after training: smaller models, sparse files, CSR and 2:4 layers, and a comparison of them."""
