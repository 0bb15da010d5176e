"""What a run is judged by: drawing and scoring, comparison before and after, pictures, plots and reports."""
