"""From audio files to stored embeddings: decode, embed, write; resumable at any point."""
