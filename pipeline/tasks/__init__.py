"""One folder a task: config, data, model, named losses and evaluation."""
