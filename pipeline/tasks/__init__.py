"""Tasks, one folder each: config, data, model, named losses and evaluation."""
