"""The decode engine: bookkeeping of texts, counted passes, and the loop with its end rules."""
