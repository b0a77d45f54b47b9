"""Extensions of blt-core, as a third party writes them."""
