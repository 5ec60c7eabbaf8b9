"""Other forms of the model: made, judged by the task, timed, one recommended."""
