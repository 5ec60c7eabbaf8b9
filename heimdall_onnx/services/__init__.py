"""The S3 store and MLflow: reaching them, their errors in plain words, the embedded ones."""
