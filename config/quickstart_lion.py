out_dir = "out/quickstart-lion"
