"""What serve.py does: text from runs over HTTP, by the API that clients of OpenAI speak, and a page to try it."""
