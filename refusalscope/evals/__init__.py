"""What an answer is worth: judges of refusal and coherence, and what an edit costs."""
