"""What zeros buy once training is over: smaller models, sparse files, CSR and 2:4 layers, and their comparison."""
