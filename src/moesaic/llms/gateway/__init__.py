"""One OpenAI-compatible endpoint in front of many models: it routes, relays, keeps the books and says what it did."""
