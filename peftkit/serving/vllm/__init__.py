"""vLLM behind the server: a process that holds the base on as many GPUs as it is told, and answers by version."""
