"""Tables (`tables`), plots (`plots`) and the HTML report (`html`) of a finished run's folder."""
