"""Where and how often it runs: the stages as commands, Ray, MLflow."""
