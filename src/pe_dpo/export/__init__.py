"""A merged model as one GGUF file with an Ollama template and golden prompts; finished folders pushed to the hub."""
