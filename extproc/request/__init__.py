"""Understanding a request: body bytes to an InferenceRequest, its blocks, its rule."""
