from .console import progress_bar as progress_bar
from .main import main as main
