out_dir = "out/quickstart-sophiag"
