"""The chain from options to files: every arrow one public function, every stage skipped when its artifact stands."""
