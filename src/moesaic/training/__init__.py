"""From a recipe to a run: `wrapping` puts the adapter on the model, `budget` solves its rank, `run` trains it."""
