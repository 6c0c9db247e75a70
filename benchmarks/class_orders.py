"""Published class orders, so that a comparison splits the classes as the original did."""

IDC_CIFAR100: tuple[int, ...] = (
    *(2, 7, 8, 13, 16, 22, 24, 26, 30, 33, 53, 54, 55, 73, 75, 78, 86, 92, 93, 95),
    *(3, 6, 18, 27, 43, 45, 48, 51, 56, 60, 62, 63, 68, 71, 74, 76, 80, 82, 90, 99),
    *(0, 1, 4, 5, 11, 15, 17, 23, 28, 34, 35, 38, 40, 41, 42, 50, 52, 59, 61, 91),
    *(10, 14, 19, 20, 29, 31, 32, 49, 57, 66, 69, 72, 77, 79, 84, 85, 89, 94, 97, 98),
    *(9, 12, 21, 25, 36, 37, 39, 44, 46, 47, 58, 64, 65, 67, 70, 81, 83, 87, 88, 96),
)
"""CIFAR-100's official fine labels in the order of IDC's continual-learning figure (Kim et al.,
ICML 2022): five experiences of 20 classes, one row each."""
